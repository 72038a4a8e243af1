"""How good is a structure?"""
