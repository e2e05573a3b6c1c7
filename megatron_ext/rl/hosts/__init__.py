"""Where ranks live: processes of this machine or Ray actors, and how the driver talks to them."""
