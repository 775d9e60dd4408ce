"""Read weight files of raysl and of other projects without running code, and recognise them."""
