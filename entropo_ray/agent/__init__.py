"""The agent: what a policy may do in a sandbox, what it is told, and one episode of it."""

from entropo_ray.agent.episode import Completion, EngineError, Generate, PromptTooLong, run_episode

__all__ = ["Completion", "EngineError", "Generate", "PromptTooLong", "run_episode"]
