"""The page: upload a video or point a camera, see what is recognized, take the results home."""
