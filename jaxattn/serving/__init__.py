"""An OpenAI-style server: fixed slots that decode together (`slots`), a scheduler (`engine`), HTTP (`app`, `asks`)."""
