"""Events in the form that clients receive."""
