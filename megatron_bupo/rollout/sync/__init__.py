"""New weights on their way to the servers: by broadcast, in requests, through files, as memory."""
