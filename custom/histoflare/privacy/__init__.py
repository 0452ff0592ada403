"""What protects an update before it leaves a site. Knows no FLARE, no slides and no models."""
