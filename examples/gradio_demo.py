"""The web demo from Python: `python examples/gradio_demo.py`, then open http://127.0.0.1:7860.

`mm-gpt demo` does the same with options.
"""

from mm_gpt.serving.gradio_demo import launch

if __name__ == "__main__":
    launch(port=7860)
