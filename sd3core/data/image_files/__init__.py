"""Images that are files of their own: folders, class folders and tables of paths."""
