"""A trajectory's text in another model's tokens, for imitation only: preferences need the tokens that were sampled."""

from __future__ import annotations

from entropo_ray import config
from entropo_ray.agent import prompts
from entropo_ray.agent.scripted import ByteChat
from entropo_ray.chat import Chat
from entropo_ray.records import Example, Trajectory


def retokenise(trajectory: Trajectory, chat: Chat, cfg: config.Agent) -> Example:
    """The sequence that run_episode would have made of the same replies with `chat`; replies are in the mask.

    `trajectory` is in ByteChat's ids. ValueError where it was made with other tools, parser or prompts than `cfg` has.
    """
    if trajectory.scaffold != prompts.scaffold(cfg):
        raise ValueError(
            f"trajectory {trajectory.task_id}/{trajectory.sample} was made with scaffold {trajectory.scaffold}, "
            f"and these settings of agent have {prompts.scaffold(cfg)}: make it again"
        )
    recorded = ByteChat()
    first = trajectory.turns[0].start if trajectory.turns else len(trajectory.token_ids)
    (_, system), (_, user) = recorded.messages(trajectory.token_ids[:first])
    ids = chat.opening(system, user)
    mask = [False] * len(ids)
    for number, turn in enumerate(trajectory.turns):
        said = trajectory.token_ids[turn.start : turn.stop]
        ended = bool(said) and said[-1] in recorded.end_ids
        reply = chat.encode(recorded.decode(said[:-1] if ended else said)) + [chat.end_ids[0]] * ended
        ids += reply
        mask += [True] * len(reply)
        if number + 1 < len(trajectory.turns):
            glue = chat.observation(turn.observation, after=ids[-1])
            ids += glue
            mask += [False] * len(glue)
    return Example(task_id=trajectory.task_id, sample=trajectory.sample, token_ids=tuple(ids), action_mask=tuple(mask))


def text(trajectory: Trajectory) -> str:
    """All that was said in an episode of ByteChat, roles included and control tokens left out."""
    return "".join(f"{role}\n{said}\n" for role, said in ByteChat().messages(trajectory.token_ids))
