"""Pure maths: torch and numpy only. No Flower, no Hugging Face, no files, no clock."""
