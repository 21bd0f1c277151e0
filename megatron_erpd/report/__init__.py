"""What a run did, for people: figures in `summary.json`, one self-contained page in `index.html`.

- `collect`: what is there of a run, as figures; light
- `render`: the page · `plots`: its pictures · `token_signal`: rollouts coloured by the signal
"""
