"""Calibration data as people have it: text, chats, tables, folders of images, pairs of both, made batches of inputs."""
