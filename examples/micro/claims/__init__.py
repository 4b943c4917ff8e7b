"""The papers' claims, put to the micro world: `python -m examples.micro.claims`.

systems    what is trained, as a recipe's config with settings over it
pieces     the jobs that make them, through the project's own entry points
runner     jobs side by side; finished ones are kept
measure    what no evaluation asks: divergence from the reading LLM, and a gap of positions
figures    one number out of one seed's results
table      the claims, as inequalities between figures
report     docs/claims.md, docs/claims.json and plots
"""
