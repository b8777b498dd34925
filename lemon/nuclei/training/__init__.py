"""Training of HoverFast's network: labelled images, windows drawn on the device, loss, loop, job."""
