"""What files and objects in memory hold, whoever asks: training or ingest."""
