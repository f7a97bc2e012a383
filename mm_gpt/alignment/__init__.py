"""Alignment: what turns a pretrained model into one that does what people want, for images and text alike.

Preferences into reward models, rewards into policies (PPO with pretraining gradients, RLOO, GRPO), preferences into
policies without a reward model (DPO and its kin), the best of several samples, rule-based rewards, pairs out of the
model's own hallucinations, and distillation.
"""
