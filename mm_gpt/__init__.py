"""mm-gpt"""
