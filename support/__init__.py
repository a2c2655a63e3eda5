"""What stands below the algorithms and knows neither of them: files, runs, drawing."""
