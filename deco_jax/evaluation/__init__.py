"""FID and its companions as the ADM suite defines them, and frequency spectra."""
