"""The `openai` package against a real server: its own types, checked strictly, its errors and its retries."""

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ADAPTERS, NAMES
from oracle import Oracle
from serving import ADMIN, EXAMPLE, Served
from transformers import AutoTokenizer

import openai
