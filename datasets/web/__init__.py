"""Web pages to documents: HTML folders and WARC files, main content, images in place."""
