#!/usr/bin/env python3
"""invariants_test.py: the page that invariants.py writes of a small list, and the lists that it refuses."""

import unittest

from invariants import page

HEADERS, PROGRAMS = {"a.hpp": "x = 1; y = 1;", "b.hpp": "x = 1;"}, {"a_test", "b_test"}


def bug(**other):
    return {"invariant": "x holds", "file": "a.hpp", "find": "x = 1", "tests": ["a_test"]} | other


class Invariants(unittest.TestCase):
    def test_one_row_per_invariant(self):
        bugs = [bug(tests=["b_test", "a_test"]), bug(invariant="|y| holds"), bug(file="b.hpp"), bug()]
        text = page(bugs, HEADERS, PROGRAMS)
        self.assertIn("hold 2 invariants, and 4 small bugs", text)
        self.assertEqual(text.splitlines()[-2:],
                         ["| x holds | 3 | `a.hpp`, `b.hpp` | `b_test`, `a_test` |",
                          "| \\|y\\| holds | 1 | `a.hpp` | `a_test` |"])

    def test_what_nobody_shows_is_refused(self):
        for wrong in [{"invariant": ""}, {"tests": []}, {"tests": ["a_test", "c_test"]}, {"file": "c.hpp"},
                      {"find": "x = 2"}, {"find": "= 1"}]:
            with self.subTest(wrong), self.assertRaises(ValueError):
                page([bug(), bug(**wrong)], HEADERS, PROGRAMS)


if __name__ == "__main__":
    unittest.main()
