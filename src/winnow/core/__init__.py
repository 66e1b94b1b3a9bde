"""What everything else rests on: types, errors, files, formats, child processes and the command line."""
