"""What the tests share: tiny models, commands in processes of their own, servers."""
