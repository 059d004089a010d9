"""A thin trainer for alignment: SFT, reward model, GRPO, merging and prompt augmentation."""
