"""How a run goes: the records it writes while it trains, and what is read and drawn from them."""
