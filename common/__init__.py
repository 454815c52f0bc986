"""What every recipe shares, model-free on purpose, in rooms that follow a run: start, data, model, step, record.

settings.py (with image_settings.py) and processes.py are the ground floor. Arrows go one way: data, model and step
know the ground floor, record knows them, start knows all.
"""
