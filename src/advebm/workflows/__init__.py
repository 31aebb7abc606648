"""What commands and experiments share: train, draw, measure, adopt, behind progress bars."""
