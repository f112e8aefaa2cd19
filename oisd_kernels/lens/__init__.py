"""Operations on the unembedding, a file each; `chunked/` and `tiled/` after `impl=`."""
