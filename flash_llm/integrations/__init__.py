"""Other libraries: transformers and its tensor parallel, and PEFT."""
