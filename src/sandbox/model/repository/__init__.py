"""URLs of repositories, and the hosts from which the server clones."""
