"""The demo: `model` computes, without Gradio; `page` is what is served, of `samples` and `questions`."""
