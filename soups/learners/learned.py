"""Learned-Soup and Learned-Soup+ (2203.05482, 2407.03641): all ingredients in memory at once."""

from __future__ import annotations

import numpy as np
import torch
from tqdm.auto import tqdm

from inputs.randomness import generator
from merge.coefficients import Coefficients
from soups.learners.descent import soup_loss
from soups.learners.registry import LearnedSettings
from soups.session import Session


def learned(session: Session, settings: LearnedSettings) -> Coefficients:
    """`A[:, g] = softmax(α[:, g])` and a temperature β, by AdamW on cross-entropy of β·f(W(A)).

    The centre is the first ingredient and the rows are the others, so K sets of weights are in
    memory and no more: as lean as holding all of them can be.
    """
    groups = session.groups(settings)
    checkpoints = session.zoo.checkpoints
    shape = (len(checkpoints), len(groups))
    alpha = torch.zeros(shape, device=session.device, requires_grad=True)
    log_beta = torch.zeros((), device=session.device, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [alpha, log_beta], lr=settings.lr, weight_decay=settings.weight_decay
    )
    bar = tqdm(total=settings.epochs, desc=session.row, unit="epoch", disable=not session.progress)
    with bar, session.mixture(groups, capacity=len(checkpoints) - 1) as mixture:
        mixture.start_at_mean(checkpoints[:1])
        mixture.load_block(checkpoints[1:])
        for epoch in range(settings.epochs):
            stream = generator(session.seed, f"{session.row}/{epoch}")
            for step, (images, labels) in enumerate(session.epoch(settings.batch_size, stream)):
                shares = alpha.softmax(dim=0)
                mixture.apply(shares[1:].detach())
                # Each step: some models cache what they computed from their weights until told.
                session.model.train(session.train_mode)
                session.norms.follow(groups, _columns(shares), first_step=step == 0)
                optimizer.zero_grad()
                logits = session.model(images) * log_beta.exp()
                loss = soup_loss(logits, labels, settings.label_smoothing)
                shares[1:].backward(mixture.gradient(loss))
                if settings.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_([alpha, log_beta], settings.clip_norm)
                optimizer.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
        session.model.eval()
        shares = alpha.detach().softmax(dim=0)
        mixture.apply(shares[1:])
    session.record["temperature"] = log_beta.exp().item()
    return session.coefficients(
        groups,
        _columns(shares),
        settings,
        temperature=log_beta.exp().item(),
    )


def _columns(shares: torch.Tensor) -> np.ndarray:
    """Columns in float64 that sum to one: the first ingredient has what the others leave."""
    columns = shares.detach().double().cpu().numpy()
    columns[0] = 1.0 - columns[1:].sum(axis=0)
    return columns
