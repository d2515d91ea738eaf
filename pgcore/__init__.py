"""PaliGemma from Scratch."""
