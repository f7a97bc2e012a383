"""What the model is asked, in training and afterwards: the same words, written once."""

CAPTION_PROMPT = "Describe the image in one sentence."
OTHER_CAPTION_PROMPTS = (
    "Describe this image.",
    "Write a caption for this photo.",
    "What is in the picture?",
    "What do you see in this image?",
    "Caption this image.",
    "Describe the photo.",
)


def question_prompt(question: str, answer: str) -> str:
    """A question as it is asked; a statement that is to be judged, seen by its answer, asks for the judgement."""
    question = question.strip()
    return f"True or false: {question}" if answer in ("true", "false") else question
