"""C: where do the rows come from?"""
