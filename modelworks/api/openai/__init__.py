"""/v1, OpenAI's API, one file a resource."""
