"""The paper's theory as tools: each of its claims measured on a model."""
