"""Tasks on real text, which installed packages bring as files: film reviews, newswire, quiz clues."""
