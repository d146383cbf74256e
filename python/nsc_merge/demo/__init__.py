"""The demo behind ``nsc-merge demo``: real images, six tasks, one small ViT, and everything measured."""
