"""From a slide to its mosaic: reading by resolution, tissue, patches, manifests.

The only part that imports OpenSlide. The mosaic follows a method that is patented in parts (US10628736B2,
US20200176102A1): see :mod:`histoflare.slides.mosaic`.
"""
