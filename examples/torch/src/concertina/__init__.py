# SPDX-License-Identifier: Apache-2.0
"""Over-parameterised linear layers, contracted into one exact kernel."""
