from tests import small
from tests.test_parallel import compare
M={"aux_loss_coefficient": 0.05, "z_loss_coefficient": 0.001}
def main():
  for name,c in {
 "tied pp2 z0 dense": (small.recipe({"tie_embeddings":True}),2,{"pp":2,"zero_stage":0}),
 "tied pp2 z0 seed5": (small.recipe({"tie_embeddings":True},M,{"seed":5}),2,{"pp":2,"zero_stage":0}),
 "tied pp2 z1": (small.recipe({"tie_embeddings":True},M),2,{"pp":2,"zero_stage":1}),
 "tied pp2 z0 seed7": (small.recipe({"tie_embeddings":True},M,{"seed":7}),2,{"pp":2,"zero_stage":0}),
 "tied tp2 z1": (small.recipe({"tie_embeddings":True},M),2,{"tp":2,"zero_stage":0}),
 "all_layers tp2 s5": (small.recipe({},{"aux_loss_scope":"all_layers","aux_loss_coefficient":0.05},{"seed":5}),2,{"tp":2}),
 "plain tp2 s5": (small.recipe({},{"aux_loss_coefficient":0.05},{}),2,{"tp":2}),
  }.items():
      try: compare(*c); print("ok  ",name,flush=True)
      except BaseException as e: print("FAIL",name,str(e)[-300:],flush=True)
if __name__=="__main__": main()
