#!/usr/bin/env python3
"""How long it takes from the click on Join to the open data channel: ten guests' pages in Chromium, one after the other, with one host's."""

import pathlib
import statistics
import sys

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import browsers

TIMES = 10


def main():
    with browsers.run_server("--rate", "0") as url, sync_playwright() as playwright, browsers.run_chromium(playwright) as chromium:
        context = chromium.new_context()
        host = browsers.ChromiumPage(context, url)
        host.host("measured")
        times = []
        for number in range(1, TIMES + 1):
            guest = browsers.ChromiumPage(context, url)
            guest.join("measured")
            times.append(int(guest.wait_for("connected with the host in ([0-9]+) ms")[1]))
            print(f"{number}: {times[-1]} ms")
            guest.close()
        print(f"Chromium {chromium.version}: median {statistics.median(times):.0f} ms from the click to the open channel, on one machine")


if __name__ == "__main__":
    main()
