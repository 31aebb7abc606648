"""What commands and experiments share: train, draw, adopt, behind progress bars."""
