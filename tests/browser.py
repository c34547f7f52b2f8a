"""What the tests need of the system: the browser that drives the widget, the page and the gallery, and a font of emoji.

`make browser` runs this file: it installs Chromium and Noto Color Emoji where they are not found. The tests call `find_browser`.
"""
import os, shutil, subprocess, sys
from pathlib import Path

names = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
advice = ('No browser for the tests: install Chromium or Chrome (Debian, Ubuntu: apt-get install chromium; Fedora: dnf install chromium; '
          'macOS: brew install --cask google-chrome), then run the command again.')
font_advice = ('No emoji font for the tests: install Noto Color Emoji (Debian, Ubuntu: apt-get install fonts-noto-color-emoji; Fedora: dnf '
               'install google-noto-color-emoji-fonts; macOS: brew install --cask font-noto-color-emoji), then run the command again.')

def works(
    path, # program, or None
)->bool: # False too where a library that it needs is missing
    "Whether a browser can be started."
    if not path or not Path(path).exists(): return False
    try: return subprocess.run([path, '--version'], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired): return False

def playwrights_own()->str|None: # None where Playwright is not installed
    "Where Playwright keeps the Chromium that it downloads; the file need not be there."
    try: from playwright.sync_api import sync_playwright
    except ImportError: return None
    with sync_playwright() as p: return p.chromium.executable_path

def find_browser()->str|None: # a program; None: there is none
    "The system's Chromium or Chrome, else Playwright's."
    system = next((p for p in map(shutil.which, names) if works(p)), None)
    if system: return system
    own = playwrights_own()
    return own if works(own) else None

def has_font()->bool: # as `mdm_dataset emoji` looks for it
    "Whether a colour emoji font is found."
    from mdm.data.emoji import find_emoji_font
    try: return bool(find_emoji_font())
    except FileNotFoundError: return False

def attempt(
    *command:str, # to run; its output goes to the terminal
)->bool: # whether it ended well
    "Run a step of the installation, and show it."
    print('+', *command, flush=True)
    try: return subprocess.run(command, timeout=900).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as e:
        print(e, flush=True)
        return False

def as_root()->list[str]|None: # what to write before a command; None: this user may not install packages
    "How a command gets the rights of root without a password."
    if hasattr(os, 'geteuid') and os.geteuid() == 0: return []
    if shutil.which('sudo') and subprocess.run(['sudo', '-n', 'true'], capture_output=True).returncode == 0: return ['sudo', '-n']

def install_from_playwright()->bool: # whether it ended well
    "Download Chromium with Playwright's installer."
    return attempt(sys.executable, '-m', 'playwright', 'install', 'chromium')

def install_from_system(
    package:str='chromium', # name of Debian's package
)->bool: # whether it ended well
    "Install the system's package, where that is apt's and this user may."
    root = as_root()
    if root is None or not shutil.which('apt-get'): return False
    quiet = ['env', 'DEBIAN_FRONTEND=noninteractive', 'apt-get']
    return attempt(*root, *quiet, 'update', '-qq') and attempt(*root, *quiet, 'install', '-y', '-qq', package)

def main()->int: # exit code
    "Make sure that there are a browser and a font. The last lines say what to do when there are none."
    for install in (install_from_playwright, install_from_system):
        if not find_browser(): install()
    if not has_font(): install_from_system('fonts-noto-color-emoji')
    missing = [text for found, text in ((find_browser(), advice), (has_font(), font_advice)) if not found]
    print(*missing, sep='\n', end='\n'*bool(missing), file=sys.stderr)
    return bool(missing)

if __name__ == '__main__': sys.exit(main())
