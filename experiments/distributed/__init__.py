"""Which launcher started the ranks, how they meet, agree and leave."""
