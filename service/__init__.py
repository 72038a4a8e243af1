"""Who asks, and what was found?"""
