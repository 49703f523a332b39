"""Many chains of steps from one model: what they share is done once, and all are compared."""
