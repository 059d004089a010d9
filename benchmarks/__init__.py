"""Benchmarks: what each op costs beside what people would use instead, on one machine, in one run.

bench_<op>.py        the cases, a pytest-benchmark file; correctness is asserted before timing
<op>_tables.py       the tables and pictures that a record of the op draws
conftest.py          the protocol of a measurement, the facts about the machine
records.py           records in results/, and the blocks of the documentation that are written from them

python -m benchmarks packing            measure, save a record
python -m benchmarks tables             rewrite the tables and pictures from the newest records
pytest benchmarks/bench_packing.py      the same cases without a record
"""
