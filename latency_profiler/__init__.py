"""What is a structure, and what does it cost on which device?"""
